"""`staticvl serve`: an artifact behind the HTTP interface that OpenAI's clients speak, and a page to try it on."""
