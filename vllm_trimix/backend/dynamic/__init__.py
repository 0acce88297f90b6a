"""Dynamic patterns in a layer: what chooses keys, where they lie on each device, and what bounds the memory."""
