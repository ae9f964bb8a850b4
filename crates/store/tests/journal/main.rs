//! The journal against a disk that loses, tears, rots and misdirects, and against a reference.

mod damage;
mod directed;
mod histories;
mod life;
mod model;
mod parked;
mod repair;
