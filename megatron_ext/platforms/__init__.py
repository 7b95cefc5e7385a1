"""Devices that the engine runs on: one file each."""
