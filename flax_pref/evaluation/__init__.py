"""Comparison of methods: paired statistics, image grids, reports."""
