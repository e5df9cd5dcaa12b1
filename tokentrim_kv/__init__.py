"""Keys, values and the book of tokens: obeys a view, knows no window."""
