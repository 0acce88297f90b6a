"""What the measuring commands share: an engine in a process of its own, prompts as text, intervals, hardware."""
