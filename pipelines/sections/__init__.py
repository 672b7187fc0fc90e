"""The sections of the configuration: keys, types, defaults, and what the reference says of them."""
