"""Memory of a rank: planned against measured, counted, tried without any, and what to say when there is none left."""
