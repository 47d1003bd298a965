"""What every stage uses: artifacts, configuration, errors, progress and the registry.

Nothing here imports a heavy library, so that `phi --help` and `phi chat` start at once.
"""
