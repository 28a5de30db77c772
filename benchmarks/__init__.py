"""Side-by-side measurements of this project and of what users would take instead; results with commit and device."""
