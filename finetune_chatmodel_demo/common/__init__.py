"""What every room and program uses: one error, one way to end, files that are whole or absent, tables."""
