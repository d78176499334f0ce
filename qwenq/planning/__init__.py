"""A model's needs on a rig, from shapes and published figures alone: memory, placement, speed, flags. No torch."""
