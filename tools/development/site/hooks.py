"""The hooks of mkdocs.yml. mkdocs loads this file by its path, as part of no package; events.py has what it calls."""

from importlib import import_module

events = import_module("staticvl.tools.development.site.events")
on_startup = events.on_startup
on_config = events.on_config
on_files = events.on_files
on_page_markdown = events.on_page_markdown
on_page_content = events.on_page_content
