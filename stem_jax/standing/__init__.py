"""How a run stands, from its folder alone."""
