"""The ``vllm-trimix`` command, one file per subcommand."""
