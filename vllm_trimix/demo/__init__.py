"""Models and prompts with known answers, made on the spot: no training, no download."""
