"""The steps of a build, a join and what follows them, which the library and the pipelines both run."""
