"""Studies: grids of recipes that are trained and compared with significance tests."""
