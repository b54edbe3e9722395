"""The commands, one module each: ``add_to`` adds a parser, ``run`` runs the command."""
