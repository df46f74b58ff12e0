"""The `hf-osd` command."""
