"""What an engine did, as figures. METRICS in the README defines each; every instrument says why it could not measure."""
