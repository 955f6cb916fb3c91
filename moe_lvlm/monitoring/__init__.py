"""Looking at runs from outside: how far they are, how they ended, what their ranks said. Files alone, and no torch."""
