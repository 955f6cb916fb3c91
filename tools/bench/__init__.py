"""What the benchmarks of tools/ share: the layers they compare, how they are checked, timed and reported."""
