"""`staticvl serve`: an artifact with an HTTP interface for OpenAI's clients, and a page to try it on."""
