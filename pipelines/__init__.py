"""Entry points: each job reads its arguments, calls the library, and says what to do next."""
