"""Where objects come from. Each source yields its whole state, again after each change."""
