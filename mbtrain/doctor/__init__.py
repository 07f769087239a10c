"""`mbtrain doctor`: what a long run would stumble over, found before it.

facts     runs on every host and says what is there      step      runs as ranks: all-reduce and real steps
asking    asks every host at once, over ssh or here      launch    starts the ranks as a training would
memory    what a rank needs, by formula                  checks    facts -> ok, warning or problem, with its remedy
examine   all of it, in order                            table     what a person reads
"""
