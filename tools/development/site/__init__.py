"""What mkdocs.yml needs to make a site of the documentation: links, the nav, pages from outside docs/."""
