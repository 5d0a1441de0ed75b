"""Several pick-up environments behind one interface: a chunk of control steps per call, images once per chunk.

`make.make_vector_env` offers three forms that give the same numbers to the last bit for the same seeds and actions:

* sequential: N simulations in this process, one after the other;
* subproc: the same in worker processes, one message per chunk, images in shared memory;
* batched: one `mujoco.batch.Batch`, whose threads run the whole chunk of all environments in one call;

and one that gives them to fp32's rounding:

* warp: MuJoCo Warp, which simulates and draws all environments on one device; images are torch tensors there.
"""
