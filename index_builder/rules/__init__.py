"""Which pairs may be neighbours: rules on metadata columns, and excluded pairs."""
