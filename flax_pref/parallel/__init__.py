"""Meshes of devices and programs of several processes."""
