"""One thin door for each command: parse, load the parameters, call one function, write the result."""
