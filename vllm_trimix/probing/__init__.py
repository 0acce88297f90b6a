"""Which layers can be triangle layers: importance of each section of the causal map, and the choice it justifies."""
