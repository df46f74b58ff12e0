"""What users choose: the options of a group, the modes of an optimizer, names and presets."""
