"""References to models, and the only code that reads or writes weights."""
