"""The passes of the pipeline, from Dynamo's graph to a graph over latents. Invariants: README.md beside this file."""
