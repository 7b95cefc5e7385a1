"""What happens, in which order: each flow on one screen."""
