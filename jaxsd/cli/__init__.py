"""The `jaxsd` command."""
