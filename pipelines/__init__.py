"""The stages, the nightly run, the configuration and the command line."""
