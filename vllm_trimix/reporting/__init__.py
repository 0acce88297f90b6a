"""One HTML page from result folders. They may come from anybody: nothing in them is trusted, see ``markdown.py``."""
