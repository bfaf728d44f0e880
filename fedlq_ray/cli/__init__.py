"""The `fedlq` command."""
