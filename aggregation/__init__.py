"""Who is asked, how updates combine, how the server moves; shared by the coordinator and the simulation."""
