"""vLLM for a GPU machine without a network: packed here, carried with the checkout, unpacked there. See README.md."""
