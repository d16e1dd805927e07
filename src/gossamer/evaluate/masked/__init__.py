"""What sparse attention changes in what a masked diffusion language model fills in."""
