"""The ``trimix`` configuration: what users write, in an entry and in files, and what runs."""
