"""Converting a dataset once: sources, writers, and the job that survives kill -9. Nothing that trains imports it."""
