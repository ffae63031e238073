"""From encoded bytes to pixels: decode and resize as the reference does, and the compiled renderer that repeats it."""
