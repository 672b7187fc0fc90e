"""The commands of `kith`, by what a person does with them; heavy modules are imported when one runs."""
