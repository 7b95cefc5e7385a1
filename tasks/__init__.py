"""One pipeline stage each: identity, cache, launch, and progress in the Prefect UI."""
