"""stub"""
import os, torch, json
from dataclasses import asdict
from encoder import *
from encoder import read_config, write_model
from tools.run import Run
def add_flags(ap, **d):
    add=ap.add_argument
    add("--weights"); add("--teacher"); add("--teacher_weights"); add("--frozen",action="store_true"); add("--out",default="run")
    for k,t in dict(batch_size=int,micro_batch=int,steps=int,epochs=int,lr=float,weight_decay=float,layer_decay=float,drop_path=float,warmup=int,lr_decay=float,clip=float,seed=int,workers=int,log_every=int,eval_every=int,save_every=int).items():
        add("--"+k,type=t,default=d.get(k,0))
def load_backbone(args):
    e=Encoder.from_pretrained(args.weights) if args.weights else Encoder(load_teacher(args.teacher,args.teacher_weights))
    return e.requires_grad_(not args.frozen)
def train(args, model, data, evaluate, config, collate=None, optimizer=None, on_signal=None):
    from torch.utils.data import DataLoader
    os.makedirs(args.out,exist_ok=True)
    opt=torch.optim.AdamW(parameter_groups(model,args.lr,args.weight_decay,args.layer_decay or 1))
    model.train()
    n=0
    for s in range(args.steps):
        batch=[torch.stack(x) for x in zip(*[data[n+i] for i in range(args.batch_size)])]; n+=args.batch_size
        f=min(1,(s+1)/max(1,args.warmup))*(1-s/args.steps)
        for g in opt.param_groups: g.setdefault("base",g["lr"]); g["lr"]=g["base"]*f
        torch.manual_seed(s)
        loss=sum(model(*batch).values()); loss.backward(); opt.step(); opt.zero_grad()
        if s%max(1,args.steps//10)==0: print(s,loss.item(),flush=True)
    model.eval()
    print(evaluate(args.out, args.steps) if evaluate.__code__.co_argcount else evaluate())
    c={**config,"vit":asdict(model.backbone.vit.config),"latent_dim":model.backbone.latent_dim,"projector":model.backbone.projector,"step":args.steps}
    write_model(os.path.join(args.out,"model.safetensors"),c,model.state_dict())
def load_model(run, build, device):
    p=os.path.join(run,"model.safetensors"); c=read_config(p)
    m=build(c); present,get=open_weights(p); load_exactly(m.state_dict(),{k:get(k) for k in present},p)
    return m.to(device).eval(), c
