"""Studies: a grid of recipes trained side by side and compared with significance."""
