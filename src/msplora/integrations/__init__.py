"""Plug-ins for other people's trainers, one file each; each imports its host and nothing else."""
