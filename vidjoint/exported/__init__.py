"""What `vidjoint.export` puts beside an exported model. These files run where vidjoint is not installed, and so import nothing of it."""
