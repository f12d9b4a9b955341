"""Where images come from: sources, transforms, loaders."""
