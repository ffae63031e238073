"""Where a run's time goes: stages measured, a verdict in words, a projection, and pages that show them."""
